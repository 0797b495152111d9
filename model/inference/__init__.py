"""Uses of a trained model: generation, serving, prediction, embeddings, speech."""
