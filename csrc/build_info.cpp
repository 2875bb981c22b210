// What was built, for `python -m eap_kernels.info` and the tests. Not a tensor operator, hence not in the library.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cuda/schedule.h"

namespace {

// A schedule as lists of tuples. A piece comes with the number of each of its steps: token of the segment x blocks +
// block.
pybind11::dict cuda_schedule(const std::vector<int64_t>& reach, const std::optional<std::vector<int64_t>>& segments,
                             int64_t tokens, int64_t columns, int64_t max_slabs, bool gathers, int64_t row_bytes,
                             int64_t workers, int64_t steps) {
  const auto s = eap::cuda::schedule(reach.data(), int64_t(reach.size()), segments ? segments->data() : nullptr, tokens,
                                     {columns, max_slabs, gathers, row_bytes}, workers, steps);
  pybind11::list tiles, pieces, splits;
  for (const auto& x : s.tiles) {
    std::vector<int> depths;
    for (int group = 0; group < columns / eap::cuda::kSlab; ++group) depths.push_back(x.depth(group));
    tiles.append(pybind11::make_tuple(x.sender, x.slabs, x.column, depths));
  }
  for (int64_t worker = 0; worker < s.workers(); ++worker) {
    pybind11::list of_worker;
    for (int32_t i = s.begin[worker]; i < s.begin[worker + 1]; ++i) {
      const auto& x = s.pieces[i];
      std::vector<int64_t> walked;
      eap::cuda::Walk walk(x, int32_t(steps));
      for (int32_t step = 0; step < x.count; ++step) {
        walk.next();
        walked.push_back(walk.token * steps + walk.block);
      }
      of_worker.append(pybind11::make_tuple(x.tile, x.segment, x.token, x.slot, walked));
    }
    pieces.append(of_worker);
  }
  for (const auto& x : s.splits) splits.append(pybind11::make_tuple(x.tile, x.segment, x.first, x.count));
  pybind11::dict d;
  d["box"] = s.box;
  d["receiver"] = s.receiver;
  d["reach"] = s.reach;
  d["tiles"] = tiles;
  d["token"] = s.token;
  d["pieces"] = pieces;
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
        pybind11::arg("columns"), pybind11::arg("max_slabs"), pybind11::arg("gathers"), pybind11::arg("row_bytes"),
        pybind11::arg("workers"), pybind11::arg("steps"), "What each worker of edge_scores does on a GPU.");
  m.attr("cuda_slab") = eap::cuda::kSlab;
}
