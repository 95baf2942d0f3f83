// The operator registry: every op's schema, once. Implementations stand beside their kernels, in the cpu/ and cuda/ of
// their family.
#include <torch/library.h>

#include "cg/schemas.h"
#include "network/schemas.h"
#include "prox/schemas.h"

TORCH_LIBRARY(imaml_ext, m) {
  for (const char* schema : imaml_ext::kCgSchemas) m.def(schema);
  for (const char* schema : imaml_ext::kProxSchemas) m.def(schema);
  for (const char* schema : imaml_ext::kNetworkSchemas) m.def(schema);
}
