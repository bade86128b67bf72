// The AMX instructions that csrc/attention_tiles.h uses, in plain C++: what it is tested with where
// the processor has none. The shapes are checked as the processor does (it raises #GP or #UD).
#include <cstdio>
#include <cstdlib>

struct EmulatedTiles {
  int rows[8] = {}, bytes[8] = {};
  float data[8][16][16];
  bool configured = false;

  void require(bool fine, const char* rule) const {
    if (fine) return;
    std::fprintf(stderr, "tile instruction: %s\n", rule);
    std::abort();
  }
  void configure(const void* from) {
    const auto* shapes = static_cast<const uint8_t*>(from);
    require(shapes[0] == 1, "the palette must be 1");
    for (int i = 0; i < 8; ++i) {
      bytes[i] = shapes[16 + 2 * i] | shapes[17 + 2 * i] << 8;
      rows[i] = shapes[48 + i];
      require(rows[i] >= 1 && rows[i] <= 16, "1 to 16 rows");
      require(bytes[i] >= 4 && bytes[i] <= 64 && bytes[i] % 4 == 0, "4 to 64 bytes");
    }
    std::memset(data, 0, sizeof data);
    configured = true;
  }
  void load(int tile, const void* from, int64_t stride) {
    require(configured, "no configuration");
    std::memset(data[tile], 0, sizeof data[tile]);
    for (int i = 0; i < rows[tile]; ++i)
      std::memcpy(data[tile][i], static_cast<const char*>(from) + i * stride, size_t(bytes[tile]));
  }
  void store(int tile, void* to, int64_t stride) const {
    require(configured, "no configuration");
    for (int i = 0; i < rows[tile]; ++i)
      std::memcpy(static_cast<char*>(to) + i * stride, data[tile][i], size_t(bytes[tile]));
  }
  void zero(int tile) {
    require(configured, "no configuration");
    std::memset(data[tile], 0, sizeof data[tile]);
  }
  void multiply(int c, int a, int b) {
    require(configured, "no configuration");
    require(c != a && c != b && a != b, "three different tiles");
    require(rows[c] == rows[a] && bytes[c] == bytes[b] && bytes[a] == 4 * rows[b],
            "shapes of C, A and B must agree");
    for (int i = 0; i < rows[c]; ++i)
      for (int k = 0; k < rows[b]; ++k)
        for (int j = 0; j < bytes[c] / 4; ++j) {
          const uint32_t left = fastdiff::float_bits(data[a][i][k]);
          const uint32_t right = fastdiff::float_bits(data[b][k][j]);
          float& sum = data[c][i][j];
          sum += fastdiff::bits_float(left << 16) * fastdiff::bits_float(right << 16);
          sum += fastdiff::bits_float(left & 0xffff0000u) *
                 fastdiff::bits_float(right & 0xffff0000u);
        }
  }
};
static thread_local EmulatedTiles emulated_tiles;

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define _tile_loadconfig(shapes) emulated_tiles.configure(shapes)
#define _tile_release() (emulated_tiles.configured = false)
#define _tile_loadd(tile, from, stride) emulated_tiles.load(tile, from, stride)
#define _tile_stored(tile, to, stride) emulated_tiles.store(tile, to, stride)
#define _tile_zero(tile) emulated_tiles.zero(tile)
#define _tile_dpbf16ps(c, a, b) emulated_tiles.multiply(c, a, b)
