"""Report how every all-reduce was fused, or why not, and which provider served which calls.

model        the records
entries      the records of a graph's all-reduces, from its nodes
text         the records as text
store        the report of this process
structure    names of compilations, equal for equal parts of a model
cache        the records of graphs in the compile cache, kept beside it
expectation  the check of `expect_fused`
"""
