"""With this folder on PYTHONPATH and EAP_PRETEND set, every Python process runs on the pretended H100.

EAP_PRETEND=values computes on the CPU, EAP_PRETEND=shapes computes nothing. `make gpu-rehearsal` sets both.
"""

import os

if os.environ.get("EAP_PRETEND"):
    from bench.pretended import pretending

    _inside = pretending(shapes=os.environ["EAP_PRETEND"] == "shapes", native=True)
    _inside.__enter__()
