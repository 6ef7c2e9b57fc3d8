// Runs one GGUF file in llama.cpp. The request comes as JSON on stdin, the answer is the last line of stdout.
//
// {home, model, tokens, greedy, top, texts} -> {architecture, logits, greedy, texts}: logits of every position of `tokens` (all of
// them by id, or pairs of the `top` ones), what follows `tokens` greedily, and the ids of each text.
// {home, model, tokens, decode, threads} -> {prefill, decode}: seconds to read `tokens`, and to decode so many after them.
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";
import {join} from "node:path";

const request = JSON.parse(readFileSync(0, "utf-8"));
const library = pathToFileURL(join(request.home, "node_modules/node-llama-cpp/dist/index.js"));
const {getLlama, LlamaLogLevel} = await import(library);
const llama = await getLlama({build: "never", gpu: false, logLevel: LlamaLogLevel.error, maxThreads: request.threads ?? 2});
const model = await llama.loadModel({modelPath: request.model});
const size = request.tokens.length + (request.greedy ?? request.decode ?? 0) + 8;
const cache = request.decode == null ? "F32" : "F16";
const context = await model.createContext({
    contextSize: size, batchSize: size, sequences: 1, flashAttention: false,
    experimentalKvCacheKeyType: cache, experimentalKvCacheValueType: cache
});

async function follow(sequence, tokens, n, each = () => {}) {
    const found = [];
    for await (const token of sequence.evaluate(tokens, {temperature: 0, yieldEogToken: true})) {
        found.push(token);
        each(found.length);
        if (found.length === n)
            break;
    }
    return found;
}

async function answer() {
    let sequence = context.getSequence();
    if (request.decode != null) {
        await follow(sequence, request.tokens, 2); // what is read and made once
        await sequence.clearHistory();
        const times = [performance.now()];
        await follow(sequence, request.tokens, request.decode + 1, () => times.push(performance.now()));
        return {prefill: (times[1] - times[0]) / 1000, decode: (times.at(-1) - times[1]) / 1000};
    }
    const logits = request.top == null ? true : {filter: {tokens: [], includeTop: request.top}};
    const read = await sequence.controlledEvaluate(request.tokens.map((token) => [token, {generateNext: {logits}}]));
    await sequence.clearHistory();
    const pairs = read.map((output) => [...output.next.logits.entries()]);
    return {
        architecture: model.fileInfo.metadata.general.architecture,
        logits: request.top == null ? pairs.map((row) => row.sort((a, b) => a[0] - b[0]).map((pair) => pair[1])) : pairs,
        greedy: await follow(sequence, request.tokens, request.greedy),
        texts: (request.texts ?? []).map((text) => [...model.tokenize(text)])
    };
}

process.stdout.write(`${JSON.stringify(await answer())}\n`, () => process.exit(0)); // not before all of it is in the pipe
