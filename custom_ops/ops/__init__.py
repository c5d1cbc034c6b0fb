"""The operators: what each one means (native), its schema, and the registry of its providers.

registry         IrOp, Provider, Support; priorities
registration     register_op: declares an operator to torch
norms            rms_norm, fused_add_rms_norm, and where they round (`form`)
all_reduce_norm  all_reduce_rms_norm, and process groups by name
sandwich_norm    all_reduce_sandwich_norm
sharded_norm     all_reduce_rms_norm_sharded, shard_rows, gather_rows
quantization     scales and FP8 values
quantized_norm   all_reduce_rms_norm_quantized (FP8), also with a sharded residual
group_names      name_group: an engine's names of groups
"""
