"""Published settings, one runnable file each: claim, command, time and the number measured."""
