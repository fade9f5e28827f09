// What the two halves of the index check share.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "sm90_plan.h"

inline long checks = 0;

#define CHECK(condition)                                          \
  do {                                                            \
    ++checks;                                                     \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                               \
    }                                                             \
  } while (false)

inline constexpr int kWidths[] = {16, 32, 48, 64, 80, 96, 128, 160};

void check_plans();
