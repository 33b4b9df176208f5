// How a shim answers its Rust module: a status, and a text beside it where that is a failure.
#pragma once

#include <cstring>
#include <exception>

#include <c10/util/Exception.h>

enum {
  SENSORIUM_OK = 0,
  SENSORIUM_FAILED = 1,
};

namespace sensorium {

// This thread's last failure. A fixed buffer, so that reporting a failure cannot fail itself (an allocation may be what
// failed).
inline thread_local char last_error[8192];

inline void remember(const char* text) noexcept {
  std::strncpy(last_error, text, sizeof(last_error) - 1);
  last_error[sizeof(last_error) - 1] = '\0';
}

// Runs `body`; no exception gets past it, for unwinding into Rust is undefined.
template <typename Body>
int guarded(Body&& body) noexcept {
  try {
    body();
    return SENSORIUM_OK;
  } catch (const c10::Error& error) {
    // what() would add a C++ stack trace of hundreds of lines.
    remember(error.what_without_backtrace());
  } catch (const std::exception& error) {
    remember(error.what());
  } catch (...) {
    remember("a C++ exception that is not a std::exception");
  }
  return SENSORIUM_FAILED;
}

}  // namespace sensorium
