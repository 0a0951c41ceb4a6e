"""The algorithm, readable in this order: acting, collector, advantages, sequences, losses, learner."""
