//! News of artifacts, from the one who watches them to the controllers of those who read them.

use std::sync::Arc;

use futures::{Stream, StreamExt as _};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::children::Key;
use super::index::{Known, Touched};
use super::kept::Own;

/// News that a controller has not taken yet. It always takes them at once; more than a few are there only while it has no
/// turn, and then the watch waits.
const QUEUE: usize = 64;

/// Where one controller hears of artifacts.
pub(super) struct News(Receiver<Vec<Key>>);

/// Who tells them.
pub(super) struct Senders([Sender<Vec<Key>>; 3]);

/// A channel for each controller of a kind that reads artifacts.
pub(super) fn channels() -> (Senders, [News; 3]) {
    let pairs = [(); 3].map(|()| channel(QUEUE));
    let senders = pairs.each_ref().map(|(sender, _)| sender.clone());
    (Senders(senders), pairs.map(|(_, receiver)| News(receiver)))
}

impl Senders {
    /// Passes `touched` on and tells everyone. Gives the artifacts themselves.
    pub(super) fn tell(self, touched: impl Stream<Item = Touched> + Send) -> impl Stream<Item = Key> + Send {
        let senders = Arc::new(self.0);
        touched.then(move |Touched { object, terms }| {
            let senders = Arc::clone(&senders);
            async move {
                for sender in &*senders {
                    // Who does not listen any more is about to end.
                    let _ = sender.send(terms.clone()).await;
                }
                object
            }
        })
    }
}

impl News {
    /// The objects of `known` that read one of the artifacts.
    pub(super) fn of_readers<K: Own>(self, known: Known<K>) -> impl Stream<Item = Key> + Send {
        let mut news = self.0;
        futures::stream::poll_fn(move |context| news.poll_recv(context)).flat_map(move |terms: Vec<Key>| {
            let readers: Vec<Key> = terms.iter().flat_map(|term| known.with_term(term)).collect();
            futures::stream::iter(readers)
        })
    }
}
