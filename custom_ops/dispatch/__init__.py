"""The choice of a provider for each call, from costs by size, the policy and the ranks' votes.

dispatcher       decide: a decision for each shape, made once
decisions        the decisions, until something that they depend on changes
policy           the text that lists providers and options
pick             the choice for one shape, without side effects
cost_model       time by variant and tokens: tuned table, shipped table, formula
cost_tables      the shipped tables; cost_formula and cost_parameters: the formula
table_store      tuned tables on disk; table_vote: which of them the ranks use
provider_vote    votes on providers that a user registers
derived_ops      sandwich and sharded operators
served           counters of calls, for the report
overview         explain_choices, for `fusewire doctor`
compare_calls    FUSEWIRE_DEBUG_CALLS: compares every call between ranks
"""
