// What was built, for `python -m eap_kernels.info` and the tests. Not a tensor operator, hence not in the library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cuda/schedule.h"

namespace {

// A schedule as lists of tuples, in the order of its structs' members.
pybind11::dict cuda_schedule(const std::vector<int64_t>& reach, const std::optional<std::vector<int64_t>>& segments,
                             int64_t tokens, int64_t max_slabs, bool sorted, int64_t workers, int64_t steps) {
  const auto s = eap::cuda::schedule(reach.data(), int64_t(reach.size()), segments ? segments->data() : nullptr, tokens,
                                     max_slabs, sorted, workers, steps);
  pybind11::list tiles, chunks, splits;
  for (const auto& x : s.tiles) tiles.append(pybind11::make_tuple(x.sender, x.slabs, x.column));
  for (const auto& x : s.chunks) chunks.append(pybind11::make_tuple(x.first, x.count, x.segment, x.slot));
  for (const auto& x : s.splits) splits.append(pybind11::make_tuple(x.segment, x.first, x.count));
  pybind11::dict d;
  d["receiver"] = s.receiver;
  d["reach"] = s.reach;
  d["tiles"] = tiles;
  d["token"] = s.token;
  d["chunks"] = chunks;
  d["splits"] = splits;
  d["slots"] = s.slots;
  return d;
}

}  // namespace

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "Facts about the native build.";
  m.attr("version") = EAP_VERSION;
  m.attr("compiler") =
#ifdef __clang__
      "clang " __clang_version__;
#else
      "g++ " __VERSION__;
#endif
  std::vector<std::string> levels;
  for (eap::Isa level : eap::kLevels) levels.push_back(eap::isa_name(level));
  m.attr("instruction_sets") = pybind11::tuple(pybind11::cast(levels));
  m.def(
      "instruction_set", [] { return std::string(eap::isa_name(eap::isa())); },
      "The instruction set level that the kernels use on this machine.");
  m.attr("cuda_architectures") = pybind11::make_tuple(EAP_CUDA_ARCHITECTURES);
  m.attr("cuda_failure") = EAP_CUDA_FAILURE;
  m.def("cuda_schedule", &cuda_schedule, pybind11::arg("reach"), pybind11::arg("segments"), pybind11::arg("tokens"),
        pybind11::arg("max_slabs"), pybind11::arg("sorted"), pybind11::arg("workers"), pybind11::arg("steps"),
        "The units of work of edge_scores on a GPU.");
  m.attr("cuda_slab") = eap::cuda::kSlab;
  m.attr("cuda_columns") = eap::cuda::kColumns;
}
