// The sparse family's CUDA kernels under emulation (server.h).
#include <string>
#include <vector>

#include "server.h"
#include "sparse/bip_released_step.h"
#include "sparse/bip_score_step.h"
#include "sparse/masked_sgd_step.h"
#include "sparse/nm_mask.h"
#include "sparse/products_cuda.h"
#include "sparse/stream.h"
#include "sparse/topk_mask.h"

namespace blokern {
namespace {

struct Call {
  const server::Call& given;

  template <class T>
  T* at(const std::string& name) const {
    return given.at(name).values<T>();
  }
  int64_t count(const std::string& name) const { return given.count(name); }
  MaskWords words() const { return {count("rows"), count("cols"), at<uint64_t>("words")}; }
  Stream stream() const {
    return {count("rows"), count("cols"), count("block"), at<int32_t>("start"), at<int32_t>("column")};
  }
};

std::string numbered(const char* name, int64_t i) { return name + std::to_string(i); }

ScoreType score_type(const std::string& dtype) {
  if (dtype == "float64") return ScoreType::float64;
  if (dtype == "float32") return ScoreType::float32;
  return dtype == "bfloat16" ? ScoreType::bfloat16 : ScoreType::float16;
}

void select(const Call& call, const CudaCall& cuda) {
  std::vector<ScoreLayer> layers;
  bool any_double = false;
  for (int64_t i = 0; i < call.count("layers"); ++i) {
    const ScoreType type = score_type(call.given.dtypes[i]);
    any_double |= type == ScoreType::float64;
    layers.push_back({call.at<char>(numbered("scores", i)), call.at<bool>(numbered("mask", i)),
                      call.count(numbered("size", i)), static_cast<int32_t>(call.count(numbered("of", i))),
                      type});
  }
  std::vector<int64_t> wanted;
  for (int64_t s = 0; s < call.count("selections"); ++s) wanted.push_back(call.count(numbered("wanted", s)));
  if (any_double)
    topk_mask<uint64_t>(layers, wanted, call.at<int>("ok"), cuda);
  else
    topk_mask<uint32_t>(layers, wanted, call.at<int>("ok"), cuda);
}

template <class T>
void step(const Call& call, const CudaCall& cuda) {
  const SgdRates rates{call.given.number("lr"), call.given.number("momentum"),
                       call.given.number("weight_decay")};
  std::vector<SgdLayer<T>> layers;
  for (int64_t i = 0; i < call.count("layers"); ++i) {
    layers.push_back({call.count(numbered("rows", i)), call.count(numbered("cols", i)),
                      call.at<T>(numbered("value", i)), call.at<T>(numbered("weight", i)),
                      call.at<T>(numbered("grad", i)), call.at<T>(numbered("buffer", i)),
                      call.at<uint64_t>(numbered("words", i)), rates});
  }
  const std::span<const SgdLayer<T>> list(layers);
  const double implicit = call.given.number("implicit");
  if (call.given.op == "bip_score_step_") return bip_score_step(list, implicit, cuda);
  if (call.given.op == "bip_released_step_") return bip_released_step(list, implicit, cuda);
  masked_sgd_step(list, cuda);
}

template <class T>
void multiply(const Call& call, const CudaCall& cuda) {
  const std::string& op = call.given.op;
  if (op == "apply_mask") return apply_mask(call.words(), call.at<const T>("weight"), call.at<T>("to"), cuda);
  if (op == "clear_masked") return clear_masked(call.words(), call.at<T>("product"), cuda);
  if (op == "skinny_spmm") {
    return skinny_spmm(
        SkinnySpmm<T>{call.words(), call.at<T>("weight"), call.count("weight_stride"), call.at<T>("x"),
                      call.count("x_stride"), call.at<T>("bias"), call.at<T>("y"), call.count("row_stride"),
                      call.count("sample_stride"), call.count("samples")},
        cuda);
  }
  if (op == "pack_entries") {
    return pack_entries(call.stream(), call.at<const T>("weight"), call.count("row_stride"),
                        call.count("col_stride"), call.at<Accum<T>>("value"), cuda);
  }
  if (op == "unpack_entries")
    return unpack_entries(call.stream(), call.at<const Accum<T>>("value"), call.at<T>("weight"), cuda);
  if (op == "packed_spmm") {
    return packed_spmm(PackedSpmm<T>{call.stream(), call.at<const Accum<T>>("value"), call.at<const T>("x"),
                                     call.at<const T>("bias"), call.at<T>("y"), call.count("row_stride"),
                                     call.count("sample_stride"), call.count("samples")},
                       cuda);
  }
  if constexpr (sizeof(T) >= sizeof(float)) {
    if (op == "stream_spmm") {
      return stream_spmm(StreamSpmm<T>{call.stream(), call.at<T>("weight"), call.count("row_stride"),
                                       call.count("col_stride"), call.at<T>("x"), call.at<T>("bias"),
                                       call.at<T>("y"), call.count("samples")},
                         cuda);
    }
    if (op == "stream_sddmm") {
      return stream_sddmm(StreamSddmm<T>{call.stream(), call.count("entries"), call.at<T>("a"),
                                         call.at<T>("b"), call.at<T>("product"), call.count("samples")},
                          cuda);
    }
  }
  emulation::fail("no kernel for " + op + " of " + server::name_of<T>());
}

void run(const server::Call& given, const CudaCall& cuda) {
  const Call call{given};
  const std::string& op = given.op;
  const auto is = [&](const char* dtype) { return given.dtypes.at(0) == dtype; };
  if (op == "topk_mask") return select(call, cuda);
  if (op == "pack_mask") return pack_mask(call.at<bool>("mask"), call.words(), cuda);
  if (op == "unpack_mask") return unpack_mask(call.words(), call.at<bool>("mask"), cuda);
  if (op == "count_words") {
    return count_words(call.at<uint64_t>("words"), call.count("size"), call.at<int64_t>("count"), cuda);
  }
  if (op == "transpose_mask") {
    const MaskWords to{call.count("cols"), call.count("rows"), call.at<uint64_t>("to")};
    return transpose_mask(call.words(), to, cuda);
  }
  if (op == "count_stream")
    return count_stream(call.words(), call.count("block"), call.at<int32_t>("start"), cuda);
  if (op == "fill_stream") {
    return fill_stream(call.words(), call.count("block"), call.at<int32_t>("start"),
                       call.at<int32_t>("column"), cuda);
  }
  if (op == "nm_mask") {
#define TRY(T)                                                                                              \
  if (is(server::name_of<T>())) {                                                                           \
    return nm_mask(NmMask<T>{call.at<T>("scores"), call.at<bool>("mask"), call.count("n"), call.count("m"), \
                             call.count("inner"), call.count("groups")},                                    \
                   call.at<int>("ok"), cuda);                                                               \
  }
    BLOKERN_FOR_IMAGE(TRY)
#undef TRY
  }
  if (op.ends_with("step_")) return is("float64") ? step<double>(call, cuda) : step<float>(call, cuda);
#define TRY(T) \
  if (is(server::name_of<T>())) return multiply<T>(call, cuda);
  BLOKERN_FOR_PRODUCT(TRY)
#undef TRY
  emulation::fail("no kernel for " + op + " of " + given.dtypes[0]);
}

}  // namespace
}  // namespace blokern

int main() {
  server::serve([](const server::Call& call, const blokern::CudaCall& cuda) { blokern::run(call, cuda); });
}
