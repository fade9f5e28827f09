// What happens to a finished tile of accumulators: the last step of fprop and dgrad, for every algorithm.
//
// A tile is rows x cols pixels of kn <= NR channels. A strip is the run of tiles whose statistics are kept together (a
// row of Winograd tiles, the rows of one direct chunk): its record is written by the one thread that computes it, and
// the records are merged afterwards in a fixed order. How strips are cut depends on the shape alone, so sums do not
// depend on threads.
#pragma once

#include "../problem.h"
#include "gemm.h"
#include "vec.h"

namespace wrn_fast {
namespace WRN_ISA {

// Numbers a channel in a strip's record. fprop: pivot, sum of y - pivot, sum of its square, unused. dgrad: sum of g and
// the rounding errors of that sum, sum of g * xhat and likewise.
constexpr int RECORD = 4;

struct OutTile {
  float* acc;                // scratch: pixel (i, j), channel c at acc[i * acc_row + j * acc_col + c]
  int64_t acc_row, acc_col;  // floats
  int rows, cols;
  int64_t pixel;                 // index of pixel (0, 0) in the output, N*P*Q order
  int64_t pixel_row, pixel_col;  // steps, in pixels
  int64_t k0;                    // first channel of the panel
  int kn;                        // channels in the panel that exist
  float* state;                  // [RECORD][NR] of the strip so far
  int64_t before;                // pixels of the strip so far; 0: state is not read
};

struct Epilogue {
  void (*run)(const Epilogue&, const OutTile&);
  int64_t channels;  // of the output: K for fprop, C for dgrad
  int64_t padded;    // channels rounded up to NR: row length of records
  float* records;    // [strips][RECORD][padded], null when no sums are wanted
  float* counts;     // [strips]: pixels; 0 for a strip without any, whose record is not read
  int64_t strips;
  const FpropArgs* fprop;
  const DgradArgs* dgrad;
  const void* addend;  // [N,P,Q,K] of the output's type: a shortcut computed beforehand; may be y itself
  const void* reads;   // what a tile reads and writes in memory, for prefetching; may be null
  const void* writes;
  int element_bytes;
};

// records stay null: whoever runs the tiles sets them when statistics are wanted.
Epilogue fprop_epilogue(const FpropArgs& args, const void* addend);
Epilogue dgrad_epilogue(const DgradArgs& args);

// The lines of a tile at `pixel`, a little ahead of its turn: rows of NR channels lie too far apart for the hardware.
WRN_INLINE void prefetch_tile(const Epilogue& e, int64_t pixel, int64_t pixel_row, int rows, int cols, int64_t k0,
                              int kn) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) {
      const int64_t at = ((pixel + i * pixel_row + j) * e.channels + k0) * e.element_bytes;
      for (int b = 0; b < kn * e.element_bytes; b += 64) {
        if (e.reads) __builtin_prefetch(static_cast<const char*>(e.reads) + at + b, 0, 3);
        if (e.writes) __builtin_prefetch(static_cast<const char*>(e.writes) + at + b, 1, 3);
      }
    }
}

// Writes the record of a strip of `pixels` pixels from its state. The first panel's call sets the count.
void close_strip(const Epilogue& e, int64_t strip, const OutTile& tile, int64_t pixels);

WRN_INLINE int64_t records_floats(const Epilogue& e, int64_t strips) {
  return strips * (RECORD * e.padded + 1);
}
WRN_INLINE void set_records(Epilogue& e, float* records, int64_t strips) {
  e.records = records;
  e.counts = records ? records + strips * RECORD * e.padded : nullptr;
  e.strips = strips;
}

// Strips of an output of N images: a strip covers strip_rows output rows (fewer in the last strip of an image).
struct Strips {
  int64_t images, height, width;
  int64_t strip_rows;
  int64_t per_image() const { return (height + strip_rows - 1) / strip_rows; }
  int64_t count() const { return images * per_image(); }
  int64_t pixels(int64_t strip) const {
    const int64_t top = strip % per_image() * strip_rows;
    return (height - top < strip_rows ? height - top : strip_rows) * width;
  }
};

// The records to stats_y (mean, biased variance) after fprop, to sums_g after dgrad. In double, strips in ascending
// order.
void merge_records(const Epilogue& e, float* statistics, int threads);

}  // namespace WRN_ISA
}  // namespace wrn_fast
