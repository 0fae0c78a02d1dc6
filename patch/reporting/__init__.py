"""Tables, figures and MLflow: pure functions of the runs table (`patch.collect`), and the writers of their files."""
