"""Report how every all-reduce was fused, or why not.

model    the records
entries  the record of one all-reduce, from its node
text     the records as text
store    the report of this process
cache    the records of graphs in the compile cache, kept beside it
"""
