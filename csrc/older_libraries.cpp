// What GCC's headers take from newer libraries than torch's wheels ask for (manylinux_2_28): defined here, a build
// loads wherever torch does. Weak, as a compiler that links its own libstdc++ statically brings a definition along.
#include <new>

#if defined(__GLIBC__) && defined(__GLIBCXX__)
#define EAP_OURS __attribute__((visibility("hidden"), weak))

extern "C" {
// glibc 2.32: whether there is but one thread, in which case shared_ptr counts faster. 0: there may be others.
EAP_OURS char __libc_single_threaded;

// GCC 11: std::__throw_bad_array_new_length.
EAP_OURS void _ZSt28__throw_bad_array_new_lengthv() { throw std::bad_array_new_length(); }
}
#endif
