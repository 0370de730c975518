// SPDX-License-Identifier: Apache-2.0
#include "preset.hpp"

namespace qeft_llm {

void apply(preset chosen, const std::function<bool(const std::string& option)>& given,
           quantize_options& o) {
  auto& search = o.layer.search;
  if (chosen != preset::paper) {
    if (chosen == preset::small && !given("--group-size")) o.layer.group_size = 64;
    if (o.layer.method == qeft::solver::layer_method::optq) {
      if (!given("--order") && !o.layer.act_order && o.reorder) o.order = column_order::sensitivity;
      if (!given("--asymmetric")) o.asymmetric = {0.5, 0.5};
      if (!given("--search-weights") && search.method == qeft::solver::search_method::grid) {
        search.weighted = true;
      }
      if (!given("--refine")) o.layer.refine_rounds = 1;
      // More than the solver needs: the calibration text is not the only text.
      if (!given("--damping")) o.layer.damping.damping = 0.3;
    }
  }
  if (search.weighted && !given("--norm")) search.norm = 2.0;
}

}  // namespace qeft_llm
