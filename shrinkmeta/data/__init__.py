"""Where tasks come from: lists of tasks, drawn again and again in an order that a number fixes."""
