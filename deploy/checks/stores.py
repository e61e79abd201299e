"""Run inside a container: both stores by their own APIs, and the model in use."""

import os
import sys
from collections import Counter

import mlflow
import numpy as np
import optuna
from mlflow.tracking import MlflowClient

trials = optuna.load_study(study_name="mnist-dnn", storage=os.environ["OPTUNA_STORAGE"]).trials
states = Counter(trial.state.name for trial in trials)
assert states["COMPLETE"] + states["PRUNED"] == int(sys.argv[1]), states
assert set(states) <= {"COMPLETE", "PRUNED", "FAIL"}, states

client = MlflowClient()
experiment = client.get_experiment_by_name("MNIST_Classification")
assert experiment is not None
runs = client.search_runs([experiment.experiment_id], max_results=1000)
mirrors = [run for run in runs if (run.info.run_name or "").startswith("trial-")]
statuses = Counter(run.info.status for run in mirrors)
assert statuses["FINISHED"] == states["COMPLETE"], statuses
assert (statuses["FAILED"], statuses["KILLED"]) == (states["FAIL"], states["PRUNED"]), statuses
(parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
assert parent.info.status == "FINISHED", parent.info.status
assert "report.html" in [entry.path for entry in client.list_artifacts(parent.info.run_id)]

version = client.get_model_version_by_alias("MNIST_DNN_Model", "production")
assert version.current_stage == "Production", version.current_stage
model = mlflow.keras.load_model("models:/MNIST_DNN_Model/Production")
answers = model.predict(np.zeros((2, *model.input_shape[1:]), np.float32), verbose=0)
assert answers.shape == (2, 10)
lost = [trial.user_attrs.get("failure") for trial in trials if trial.state.name == "FAIL"]
print(f"         {dict(states)}, failed: {lost}; version {version.version} is in production")
