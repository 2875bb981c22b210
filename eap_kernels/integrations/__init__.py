"""Other circuit codebases, unchanged, with the operators of this package: `patch()` of `eap_ig`, `auto_circuit` and
`transformer_lens`.

Importing a module here does not import its codebase; `patch()` does.
"""
