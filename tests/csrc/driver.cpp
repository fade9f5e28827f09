// C entry points for tests/csrc: one function a kernel, the instruction set by name, errors as codes.
#include <cstring>
#include <new>

#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/scratch.h"

namespace {

template <class F>
int guarded(const char* isa, const F& f) {
    const wrn_fast::Kernels* table = wrn_fast::kernels_named(isa);
    if (!table) return 1;
    try {
        f(*table);
    } catch (const std::bad_alloc&) {
        return 2;
    }
    return 0;
}

}  // namespace

extern "C" {

int test_fprop(const char* isa, const wrn_fast::FpropArgs* args) {
    return guarded(isa, [&](const wrn_fast::Kernels& k) { k.fprop(*args); });
}

int test_dgrad(const char* isa, const wrn_fast::DgradArgs* args) {
    return guarded(isa, [&](const wrn_fast::Kernels& k) { k.dgrad(*args); });
}

int test_pack(const char* isa, const wrn_fast::PackArgs* args, int64_t* floats) {
    return guarded(isa, [&](const wrn_fast::Kernels& k) {
        *floats = k.packed_size(*args);
        if (args->out) k.pack(*args);
    });
}

int test_choose_algo(const wrn_fast::ConvShape* shape, bool dgrad, bool pin_batch) {
    return static_cast<int>(wrn_fast::choose_algo(*shape, dgrad, pin_batch));
}

int64_t test_scratch_bytes() { return wrn_fast::scratch_bytes(); }

// The layout that the ctypes structures must repeat.
int64_t test_sizeof(const char* name) {
    if (!strcmp(name, "ConvShape")) return sizeof(wrn_fast::ConvShape);
    if (!strcmp(name, "Prologue")) return sizeof(wrn_fast::Prologue);
    if (!strcmp(name, "FpropArgs")) return sizeof(wrn_fast::FpropArgs);
    if (!strcmp(name, "DgradArgs")) return sizeof(wrn_fast::DgradArgs);
    if (!strcmp(name, "PackArgs")) return sizeof(wrn_fast::PackArgs);
    return -1;
}
}
