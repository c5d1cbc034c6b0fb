"""FlashInfer's fused all-reduce kernels as a provider.

provider          what it can serve; FlashInferProvider
limits            sizes and memory
workspace         FlashInferWorkspace: calls, self-test, freeing
library           the Python package, its version and compiled kernels
compile_progress  how far the compilation of the kernels is
"""
