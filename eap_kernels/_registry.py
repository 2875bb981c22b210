"""Every backend there is, by name: error messages, `backends()`, tests and benches list these."""

from eap_kernels.cpu import Cpu
from eap_kernels.cuda import Cuda
from eap_kernels.reference import Backend
from eap_kernels.triton import Triton

BACKENDS = {backend.name: backend for backend in (Backend(), Cpu(), Triton(), Cuda())}
