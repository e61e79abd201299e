"""The network: hyperparameters -> a compiled Keras model."""

import keras

from search.space import RECIPE, Hyperparameters


def build(
    hyperparameters: Hyperparameters, features: int, classes: int, seed: int
) -> keras.Sequential:
    """A plain, compiled network: flat input -> Dense, ReLU -> Dropout -> Dense, softmax.

    It takes float32 of shape (n, features) and gives probabilities of shape (n, classes).
    Its initial weights (Glorot and Bengio 2010, Keras' default) depend on `seed` alone.
    """
    model = keras.Sequential(
        [
            keras.Input((features,), name="example"),
            keras.layers.Dense(
                hyperparameters.hidden_units,
                activation=RECIPE["activation"],
                kernel_initializer=keras.initializers.GlorotUniform(seed),
                name="hidden",
            ),
            keras.layers.Dropout(hyperparameters.dropout_rate, seed=seed, name="dropout"),
            keras.layers.Dense(
                classes,
                activation=RECIPE["output_activation"],
                kernel_initializer=keras.initializers.GlorotUniform(seed + 1),
                name="probabilities",
            ),
        ],
        name="dense_network",
    )
    model.compile(
        optimizer=keras.optimizers.Adam(hyperparameters.learning_rate),
        loss=RECIPE["loss"],
        metrics=["accuracy"],
        jit_compile=False,  # XLA on the CPU is several times slower than TensorFlow's kernels
    )
    return model


def trainable_parameters(model: keras.Model) -> int:
    """How many numbers training adjusts."""
    return sum(int(weight.shape.num_elements()) for weight in model.trainable_weights)
