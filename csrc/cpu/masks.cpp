// The gradient by x alone, where nothing else wants one: the pass that writes the mask and the epilogue that reads it.
#include "masks.h"

#include "act.h"
#include "philox.h"
#include "tiles.h"

namespace wrn_fast {
namespace WRN_ISA {
namespace {

WRN_INLINE int64_t mask_bytes(int64_t C) {
  return (C + 7) / 8;
}

template <class T, Act act>
WRN_INLINE void masked_channels(const Epilogue& e, const OutTile& t, int c, int n) {
  const DgradArgs& a = *e.dgrad;
  const Dropout& dropout = a.prologue.dropout;
  T* dx = static_cast<T*>(a.g);
  const int64_t k = t.k0 + c, pitch = mask_bytes(e.channels);
  const Vec scale = a.out_scale ? load_upto(a.out_scale + k, n) : broadcast(1.f);
  const Vec slope = broadcast(a.prologue.slope);
  for (int i = 0; i < t.rows; ++i) {
    for (int j = 0; j < t.cols; ++j) {
      const int64_t pixel = t.pixel + i * t.pixel_row + j * t.pixel_col;
      const int64_t at = pixel * e.channels + k;
      Vec v = load(t.acc + i * t.acc_row + j * t.acc_col + c);
      if (dropout.active) v *= dropout_vector(at, dropout);
      if (act != Act::identity) {
        const uint8_t* byte = a.mask + pixel * pitch + k / 8;
        unsigned bits = byte[0];
        if (VL > 8 && n > 8) bits |= static_cast<unsigned>(byte[1]) << 8;
        if (VL < 8) bits >>= k % 8;
        v = select(mask_of_bits(bits), v, act == Act::relu ? zero() : v * slope);
      }
      store_upto(dx + at, v * scale, n);
    }
  }
}

template <class T, Act act>
void tile(const Epilogue& e, const OutTile& t) {
  for (int c = 0; c < t.kn; c += VL) {
    if (t.kn - c >= VL)
      masked_channels<T, act>(e, t, c, VL);
    else
      masked_channels<T, act>(e, t, c, t.kn - c);
  }
}

template <class T>
void mask_rows(const MaskArgs& args, int64_t begin, int64_t end) {
  const int64_t C = args.C;
  const T* x = static_cast<const T*>(args.x);
  const Prologue& p = args.prologue;
  for (int64_t r = begin; r < end; ++r) {
    uint8_t* row = args.mask + r * mask_bytes(C);
    for (int64_t first = 0; first < C; first += 16) {
      unsigned bits = 0;
      for (int64_t c = first; c < first + 16 && c < C; c += VL) {
        const int64_t left = C - c;
        const Vec v = pre_activation(p, load_upto(x + r * C + c, left), c, left);
        const unsigned here = p.act == Act::relu ? ~bits_of_mask(less_equal(v, zero())) & ((1u << VL) - 1u)
                                                 : bits_of_mask(greater(v, zero()));
        bits |= (left < VL ? here & ((1u << left) - 1u) : here) << (c - first);
      }
      row[first / 8] = static_cast<uint8_t>(bits);
      if (C - first > 8) row[first / 8 + 1] = static_cast<uint8_t>(bits >> 8);
    }
  }
}

template <class T>
void (*masked_tile_of(Act act))(const Epilogue&, const OutTile&) {
  switch (act) {
    case Act::relu:
      return tile<T, Act::relu>;
    case Act::leaky_relu:
      return tile<T, Act::leaky_relu>;
    default:
      return tile<T, Act::identity>;
  }
}

}  // namespace

void (*masked_tile(DType dtype, Act act))(const Epilogue&, const OutTile&) {
  return dtype == DType::f32 ? masked_tile_of<float>(act) : masked_tile_of<bf16>(act);
}

void act_mask(const MaskArgs& args) {
  const Chunks chunks(args.rows, args.C);
#pragma omp parallel for num_threads(args.threads) schedule(static) if (args.threads > 1 && chunks.count > 1)
  for (int64_t i = 0; i < chunks.count; ++i)
    args.dtype == DType::f32 ? mask_rows<float>(args, chunks.begin(i), chunks.end(i))
                             : mask_rows<bf16>(args, chunks.begin(i), chunks.end(i));
}

}  // namespace WRN_ISA
}  // namespace wrn_fast
