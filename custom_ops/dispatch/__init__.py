"""The choice of a provider for each call, from costs by size, the policy and the ranks' votes."""
