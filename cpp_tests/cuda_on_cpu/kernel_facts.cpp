#include "kernel_facts.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <set>
#include <span>
#include <stdexcept>
#include <vector>

#include "shared_memory.h"

namespace cuda_on_cpu {
namespace {

using Address = ElfW(Addr);
using Symbol = ElfW(Sym);
using Relocation = ElfW(Rela);

// The file that a kernel is in: its functions, and what each refers to by the relocations that the linker has left.
class Module {
 public:
  explicit Module(const char* path) {
    std::ifstream file(path, std::ios::binary);
    bytes_.assign(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
    if (bytes_.size() < sizeof(ElfW(Ehdr))) throw std::logic_error(std::string("cuda_on_cpu: cannot read ") + path);
    const auto& header = *at<ElfW(Ehdr)>(0);
    is_relative_ = header.e_type == ET_DYN;
    const std::span sections(at<ElfW(Shdr)>(header.e_shoff), header.e_shnum);
    for (const auto& section : sections) {
      if (section.sh_type != SHT_SYMTAB) continue;
      symbols_ = {at<Symbol>(section.sh_offset), section.sh_size / sizeof(Symbol)};
      names_ = at<char>(sections[section.sh_link].sh_offset);
    }
    for (const auto& symbol : symbols_) {
      if (type_of(symbol) == STT_FUNC && symbol.st_size > 0) functions_[symbol.st_value].symbol = &symbol;
    }
    bool has_relocations = false;
    for (const auto& section : sections) {
      if (section.sh_type != SHT_RELA || section.sh_info == 0) continue;
      if ((sections[section.sh_info].sh_flags & SHF_EXECINSTR) == 0) continue;
      has_relocations = true;
      for (const auto& relocation :
           std::span(at<Relocation>(section.sh_offset), section.sh_size / sizeof(Relocation))) {
        refer(relocation);
      }
    }
    if (!has_relocations) {
      throw std::logic_error(std::string("cuda_on_cpu: ") + path +
                             " must be compiled with -ffunction-sections and linked with -Wl,--emit-relocs");
    }
  }

  const char* name_of(Address address) const { return names_ + functions_.at(address).symbol->st_name; }

  size_t static_shared(Address address) const {
    std::set<Address> reached;
    std::set<const Symbol*> variables;
    std::vector<Address> open{address};
    while (!open.empty()) {
      const Address next = open.back();
      open.pop_back();
      if (!reached.insert(next).second) continue;
      const Function& function = functions_.at(next);
      variables.insert(function.variables.begin(), function.variables.end());
      open.insert(open.end(), function.callees.begin(), function.callees.end());
    }
    size_t bytes = 0;
    bool is_followed = false;  // by dynamic shared memory
    for (const auto* variable : variables) {
      if (is_dynamic(*variable)) {
        is_followed = true;
      } else {
        bytes += variable->st_size;
      }
    }
    return is_followed ? (bytes + kAlignmentOfDynamicShared - 1) & -kAlignmentOfDynamicShared : bytes;
  }

  bool is_relative() const { return is_relative_; }

 private:
  struct Function {
    const Symbol* symbol;
    std::set<const Symbol*> variables;
    std::set<Address> callees;
  };
  using Functions = std::map<Address, Function>;

  template <typename T>
  const T* at(size_t offset) const {
    return reinterpret_cast<const T*>(bytes_.data() + offset);
  }
  static int type_of(const Symbol& symbol) { return symbol.st_info & 0xf; }

  bool is_dynamic(const Symbol& variable) const {
    return std::string_view(names_ + variable.st_name).ends_with("dynamic_shared_memoryE");
  }

  // The function whose code holds the address.
  Functions::iterator around(Address address) {
    auto next = functions_.upper_bound(address);
    if (next == functions_.begin()) return functions_.end();
    --next;
    return address - next->first < next->second.symbol->st_size ? next : functions_.end();
  }

  void refer(const Relocation& relocation) {
    const auto from = around(relocation.r_offset);
    if (from == functions_.end()) return;
    const auto& symbol = symbols_[relocation.r_info >> (sizeof(Address) == 8 ? 32 : 8)];
    if (type_of(symbol) == STT_TLS) {
      from->second.variables.insert(&symbol);
      return;
    }
    // A function is named by its section too, from the end of the field that the linker fills in: four bytes on.
    Address to = symbol.st_value;
    if (type_of(symbol) == STT_SECTION) to += static_cast<Address>(relocation.r_addend) + 4;
    const auto callee = around(to);
    if (callee != functions_.end()) from->second.callees.insert(callee->first);
  }

  std::vector<char> bytes_;
  bool is_relative_ = false;
  std::span<const Symbol> symbols_;
  const char* names_ = nullptr;
  Functions functions_;
};

std::string short_name(const char* mangled) {
  int status = 0;
  char* const plain = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = plain != nullptr ? plain : mangled;
  std::free(plain);
  if (name.ends_with(')')) {  // the parameters, from their last bracket to its fellow
    size_t end = name.size();
    int depth = 0;
    do {
      --end;
      depth += name[end] == ')' ? 1 : name[end] == '(' ? -1 : 0;
    } while (depth > 0);
    name.resize(end);
  }
  if (name.starts_with("void ")) name.erase(0, 5);
  for (const std::string_view part : {"imaml_ext::", "(anonymous namespace)::"}) {
    for (size_t i = name.find(part); i != std::string::npos; i = name.find(part)) name.erase(i, part.size());
  }
  for (size_t i = name.find("> >"); i != std::string::npos; i = name.find("> >")) name.erase(i + 1, 1);
  return name;
}

}  // namespace

const KernelFacts& facts_of(const void* kernel) {
  static std::mutex mutex;
  static std::map<std::string, Module> modules;
  static std::map<const void*, KernelFacts> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(kernel);
  if (found != known.end()) return found->second;
  Dl_info info{};
  if (dladdr(kernel, &info) == 0) throw std::logic_error("cuda_on_cpu: a kernel that is in no module");
  const Module& module = modules.try_emplace(info.dli_fname, info.dli_fname).first->second;
  const Address base = module.is_relative() ? reinterpret_cast<Address>(info.dli_fbase) : 0;
  const Address address = reinterpret_cast<Address>(kernel) - base;
  return known.emplace(kernel, KernelFacts{short_name(module.name_of(address)), module.static_shared(address)})
      .first->second;
}

}  // namespace cuda_on_cpu
