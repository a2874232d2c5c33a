//! Builds every task from the configuration, joins them with channels, stops them in order.
