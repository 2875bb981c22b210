"""`python -m eap_circuits` is the `eap` command, as `torchrun -m eap_circuits` starts it."""

from .cli.entry import main

main()
