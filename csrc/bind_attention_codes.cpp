// Thin: segments of coded tokens by their addresses, kept from call to call.
#include <nanobind/stl/pair.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention_codes.h"
#include "bindings.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

// An address and the type of what lies there.
using Stored = std::pair<uintptr_t, int32_t>;

class CodedSegments {
 public:
  void add(uintptr_t k, uintptr_t v, int64_t tiles, int64_t bits, uintptr_t counts, Stored k_low,
           Stored k_step, Stored v_low, Stored v_step, Stored v_channel) {
    if (bits != 2 && bits != 4 && bits != 8) {
      throw std::invalid_argument("bits=" + std::to_string(bits) + ": expected 2, 4 or 8");
    }
    segments_.push_back({reinterpret_cast<const uint8_t*>(k), reinterpret_cast<const uint8_t*>(v),
                         tiles, bits, reinterpret_cast<const int64_t*>(counts), scales(k_low),
                         scales(k_step), scales(v_low), scales(v_step), scales(v_channel)});
  }

  void attend(const AttendArgs& args, uintptr_t o, int64_t batch, int64_t head, int64_t row,
              uintptr_t lse, int threads) const {
    CodedPrior prior{};
    prior.o = {reinterpret_cast<void*>(o), batch, head, row};
    prior.lse = reinterpret_cast<const float*>(lse);
    attend_coded(args, segments_.data(), static_cast<int64_t>(segments_.size()), prior, threads);
  }

 private:
  static Scales scales(Stored s) {
    return {reinterpret_cast<const void*>(s.first), static_cast<AttendType>(s.second)};
  }
  std::vector<CodedSegment> segments_;
};

}  // namespace

void bind_attention_codes(nb::module_& m) {
  nb::class_<CodedSegments>(m, "CodedSegments")
      .def(nb::init<>())
      .def("add", &CodedSegments::add)
      .def("attend", &CodedSegments::attend, nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace aerogel
