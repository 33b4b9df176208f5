// See ../../README.md.
#pragma once

namespace gloo::transport {

class Device;

// Only ever destroyed through this base, by libtorch's own code.
class UnboundBuffer {
 public:
  virtual ~UnboundBuffer();
};

}  // namespace gloo::transport
