"""`python -m eap_kernels.tune`: measure which backends are right and fastest on this machine, and store the choice.

On a GPU the first call of an operator does the same for its arithmetic. This does all at once, say for a cluster. With
--again it measures anew what is stored. Devices may be named; by default every kind of GPU there is, else the CPU.

    python -m eap_kernels.tune [--again] [cuda:1 cpu ...]
"""

from __future__ import annotations

import sys

from eap_kernels.info import show
from eap_kernels.tune.devices import tune


def main() -> None:
    words = sys.argv[1:]
    if "-h" in words or "--help" in words:
        show(str(__doc__))
        return
    try:
        for line in tune([word for word in words if word != "--again"], "--again" in words):
            show(line)
    except RuntimeError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
