"""SparseGPT in plain torch: the loop over columns, in blocks of 128.

Frantar and Alistarh, `SparseGPT <https://arxiv.org/abs/2301.00774>`_, 2023, algorithm 1 as the released code has it: float32;
in each block the cheapest weights of all rows go, the one at the threshold included; of N:M the cheapest of each group when the
loop arrives at it.
"""

import torch

BLOCK = 128


def factor(gram: torch.Tensor, damp: float) -> torch.Tensor:
    """The upper triangular U with U^T U = (gram + damp mean(diag) I)^-1."""
    h = gram.clone()
    h.diagonal().add_(damp * gram.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)


@torch.no_grad()
def sparsegpt(weights: torch.Tensor, gram: torch.Tensor, fraction: float, nm: tuple[int, int] | None, damp: float = 0.01):
    """The weights [out, in] with zeros; `nm` says how many of how many inputs in a row stay, None leaves it to `fraction`."""
    w, u = weights.clone(), factor(gram, damp)
    for start in range(0, w.shape[1], BLOCK):
        end = min(start + BLOCK, w.shape[1])
        block, own = w[:, start:end].clone(), u[start:end, start:end]
        scale = own.diagonal() ** 2
        errors, new = torch.zeros_like(block), torch.zeros_like(block)
        gone = torch.zeros_like(block, dtype=torch.bool)
        if nm is None:
            scores = block**2 / scale
            gone = scores <= scores.flatten().sort()[0][int(scores.numel() * fraction)]
        for j in range(end - start):
            if nm is not None and j % nm[1] == 0:
                scores = block[:, j : j + nm[1]] ** 2 / scale[j : j + nm[1]]
                gone.scatter_(1, j + scores.topk(nm[1] - nm[0], dim=1, largest=False)[1], True)
            column = block[:, j]
            new[:, j] = column.masked_fill(gone[:, j], 0)
            errors[:, j] = (column - new[:, j]) / own[j, j]
            block[:, j:] -= errors[:, j, None] * own[None, j, j:]
        w[:, start:end] = new
        w[:, end:] -= errors @ u[start:end, end:]
    return w
