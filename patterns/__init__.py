"""Define spellings as data: collectives, norms, and the patterns that fuse.

collectives  SPELLINGS of all-reduces; read_all_reduce
norms        TAILS, VARIANTS and NORM_OPS: spellings of RMSNorm
fusions      FUSIONS, EPILOGUES, SEQUENCE_FUSIONS: trees and their replacements
"""
