"""A study: dense models and mixtures of experts, trained alike and compared by what each loss costs."""
