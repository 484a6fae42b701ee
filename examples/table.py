"""A table with numbers, booleans, categories and empty cells: fit, look at the plots, save, load.

Run: python examples/table.py plots.png
"""

import sys

import matplotlib.pyplot as plt
from sklearn.model_selection import train_test_split

import fspace
from fspace import plots
from fspace.data import load_diabetes_table

table = load_diabetes_table()
table["sex"] = (
    table["sex"].map({1.0: "one", 2.0: "two"}).astype("category")
)  # a category type makes it a category
table["over_50"] = table["age"] > 50
table.loc[::20, "bmi"] = float("nan")
inputs, target = table.drop(columns="progression"), table["progression"]
X_train, X_test, y_train, y_test = train_test_split(inputs, target, random_state=0)

model = fspace.GPRegressor(missing="impute").fit(X_train, y_train)
predictive = model.predictive(X_test)
print("predicts with:", model.choice_["weights"])
print(f"mean log density of held-out rows: {predictive.log_prob(y_test).mean():.3f}")

_, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
plots.predicted_vs_observed(y_test, predictive, name="progression", ax=axes[0, 0])
plots.calibration(y_test, predictive, ax=axes[0, 1])
plots.draws_along(model, X_train, "bmi", name="progression", ax=axes[1, 0])
plots.draws_along(model, X_train, "sex", name="progression", ax=axes[1, 1])
picture = sys.argv[1] if len(sys.argv) > 1 else "plots.png"
plt.savefig(picture, dpi=110)

model.save("table.fspace")
assert (fspace.load("table.fspace").predict(X_test) == model.predict(X_test)).all()
print(f"open {picture}; the model is table.fspace")
