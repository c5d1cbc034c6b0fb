"""The choice of a provider for each call: costs by size, the policy, and what the ranks voted on."""
