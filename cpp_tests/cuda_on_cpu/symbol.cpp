#include "symbol.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <sstream>
#include <vector>

namespace cuda_on_cpu {
namespace {

// dladdr knows exported functions alone, and a kernel is none: its name is in the file's table of all symbols.
std::string symbol_at(const Dl_info& module, const void* address) {
  std::ifstream file(module.dli_fname, std::ios::binary);
  std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (bytes.size() < sizeof(ElfW(Ehdr))) return "";
  const auto* const header = reinterpret_cast<const ElfW(Ehdr)*>(bytes.data());
  const auto* const sections = reinterpret_cast<const ElfW(Shdr)*>(bytes.data() + header->e_shoff);
  const auto base = header->e_type == ET_DYN ? reinterpret_cast<uintptr_t>(module.dli_fbase) : 0;
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const auto* const symbols = reinterpret_cast<const ElfW(Sym)*>(bytes.data() + sections[s].sh_offset);
    const char* const names = bytes.data() + sections[sections[s].sh_link].sh_offset;
    for (size_t i = 0; i < sections[s].sh_size / sizeof(ElfW(Sym)); ++i) {
      const bool is_function = (symbols[i].st_info & 0xf) == STT_FUNC;
      if (is_function && base + symbols[i].st_value == reinterpret_cast<uintptr_t>(address)) {
        return names + symbols[i].st_name;
      }
    }
  }
  return "";
}

}  // namespace

std::string name_of(const void* address) {
  Dl_info module{};
  std::string name;
  if (dladdr(address, &module) != 0 && module.dli_fname != nullptr) name = symbol_at(module, address);
  if (name.empty()) {
    std::ostringstream text;
    text << address;
    return text.str();
  }
  int status = 0;
  char* const plain = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  if (plain == nullptr) return name;
  name = plain;
  std::free(plain);
  return name;
}

}  // namespace cuda_on_cpu
