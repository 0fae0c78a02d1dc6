"""Tables, figures and MLflow: pure functions of the tables of `patch.collect`, and the writers of their files."""
