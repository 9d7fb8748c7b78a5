"""What several test files share: builders of small inputs, plain references, worker processes."""
