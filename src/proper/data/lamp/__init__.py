"""LaMP benchmark: download, official files and OPPU's files as rows of users and interactions."""
