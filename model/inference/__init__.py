"""What a trained model is used for: generation, serving, prediction, embeddings, speech."""
