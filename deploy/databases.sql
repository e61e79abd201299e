-- Optuna's tables and MLflow's cannot share a database; the first one is made by the server's image.
CREATE DATABASE mlflow;
