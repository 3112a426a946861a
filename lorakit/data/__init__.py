"""From a user's file to batches of token ids: rows are read (`read`, `parse`), their shape is told from their columns
(`shapes`), each is rendered to ids and a mask of what is trained (`render`), measured and limited (`dataset`), ordered
and padded (`batches`), and shown as the model will see them (`show`). Nothing here knows of models or of training.
"""
