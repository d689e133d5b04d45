"""Search for the settings of ``apply``, on Optuna: in processes, on several machines, on Ray."""
