#include <algorithm>
#include <vector>

#include "sparse/topk_mask_cuda.cuh"

namespace blokern {
namespace {

constexpr int64_t kChunk = int64_t{kTeamThreads} * 16;  // the least scores a block
constexpr int64_t kBlocksAMultiprocessor = 8;

std::vector<LayerList> lists_of(std::span<const ScoreLayer> layers) {
  int64_t total = 0;
  for (const ScoreLayer& layer : layers) total += layer.size;
  const int64_t blocks = kBlocksAMultiprocessor * device_attribute(cudaDevAttrMultiProcessorCount);
  const int64_t chunk = kChunk * std::max<int64_t>(1, total / (kChunk * blocks));
  std::vector<LayerList> lists;
  int64_t chunks = 0, of_selection = 0;
  int32_t selection = -1;
  for (const ScoreLayer& layer : layers) {
    if (layer.selection != selection) of_selection = chunks;
    selection = layer.selection;
    if (layer.size == 0) continue;
    if (lists.empty() || lists.back().chunks.count == kListed) {
      lists.push_back({});
      lists.back().first = chunks;
      lists.back().chunk = chunk;
    }
    LayerList& list = lists.back();
    list.layers[list.chunks.count] = layer;
    list.selection[list.chunks.count] = of_selection;
    list.chunks.append((layer.size - 1) / chunk + 1);
    chunks = list.first + list.chunks.blocks();
  }
  return lists;
}

}  // namespace

template <class K>
void topk_mask(std::span<const ScoreLayer> layers, std::span<const int64_t> wanted, int* ok,
               const CudaCall& call) {
  const std::vector<LayerList> lists = lists_of(layers);
  if (lists.empty()) return;
  const size_t selections = wanted.size(), chunks = lists.back().first + lists.back().chunks.blocks();
  auto* const counts =
      static_cast<DigitCount*>(call.zeros(selections * Digit<K>::kValues * sizeof(DigitCount)));
  auto* const chosen = static_cast<Chosen<K>*>(call.zeros(selections * sizeof(Chosen<K>)));
  auto* const equal = static_cast<int64_t*>(call.zeros(chunks * sizeof(int64_t)));
  Digit<K> at;
  for (int pass = 0; pass < Digit<K>::kPasses; ++pass, at.fix(0)) {
    for (const LayerList& list : lists)
      launch(count_digits<K>, list.chunks.blocks(), kTeamThreads, false, call, list, at, chosen, counts);
    for (size_t first = 0; first < selections; first += kListed) {
      const size_t some = std::min<size_t>(kListed, selections - first);
      WantedList of{};
      std::copy_n(wanted.begin() + first, some, of.of);
      launch(choose_digit<K>, some, kTeamThreads, false, call, of, static_cast<int64_t>(first), at, chosen,
             counts, ok);
    }
  }
  for (const LayerList& list : lists)
    launch(mask_larger<K>, list.chunks.blocks(), kTeamThreads, false, call, list, chosen, equal);
  for (const LayerList& list : lists)
    launch(mask_ties<K>, list.chunks.blocks(), kTeamThreads, false, call, list, chosen, equal);
}

template void topk_mask<uint32_t>(std::span<const ScoreLayer>, std::span<const int64_t>, int*,
                                  const CudaCall&);
template void topk_mask<uint64_t>(std::span<const ScoreLayer>, std::span<const int64_t>, int*,
                                  const CudaCall&);

}  // namespace blokern
