"""Other circuit codebases, unchanged, with the operators of this package: `eap_ig.patch()`, `auto_circuit.patch()`.

Importing a module here does not import its codebase; `patch()` does.
"""
