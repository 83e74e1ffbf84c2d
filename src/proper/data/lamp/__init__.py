"""The LaMP benchmark: its official files and those of OPPU, as rows of users and interactions."""
