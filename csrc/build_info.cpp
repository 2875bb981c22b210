// What was built, for `python -m eap_kernels.info` and the tests. Not a tensor operator, hence not in the library.
#include <pybind11/pybind11.h>

#include <string>

#include "cpu/isa.h"

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Facts about the native build.";
  m.attr("version") = EAP_VERSION;
  m.attr("compiler") =
#ifdef __clang__
      "clang " __clang_version__;
#else
      "g++ " __VERSION__;
#endif
#ifdef EAP_X86_LEVELS
  m.attr("instruction_sets") = pybind11::make_tuple("default", "x86-64-v3", "x86-64-v4", "x86-64-v4-bf16");
#else
  m.attr("instruction_sets") = pybind11::make_tuple("default");
#endif
  m.def("instruction_set", [] { return std::string(eap::isa_name(eap::isa())); },
        "The instruction set level that the kernels use on this machine.");
}
