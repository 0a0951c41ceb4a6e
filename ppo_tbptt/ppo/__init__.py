"""The algorithm, readable in this order: acting, collector, advantages, sequences, refresh, losses, learner."""
