"""Define spellings as data: collectives, norms, quantisation, and what fuses.

collectives    SPELLINGS of all-reduces; read_all_reduce
norms          TAILS, VARIANTS and NORM_OPS: spellings of RMSNorm
quantizations  QUANT_OPS: operators that quantise to FP8
fusions        FUSIONS, EPILOGUES, SEQUENCE_FUSIONS: trees and their replacements
"""
