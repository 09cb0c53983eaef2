/* The recovery round: the database loses a suffix of its commits, once, and the journals put back what it lost. protocols: Recovery round.

   Modelled from the specification; where the code is to be compared is marked COMPARE. One request key K; nodes 0 and 1 issue (node i proposes serial
   i+1, its signature is number i+1) and hold copies of each other's done records; node 2 abandons what its policy refuses. gen is the newest row of
   the round chain, lg[i] the round that node i has taken up, rec[i] the round for which node i's records are back (recon rows).

   Rules that can be removed: -DMEMRELEASE -DNOJSIG (done without the bytes) -DNOGATE (issuing goes on during the round) -DNOLOCK (no release lock)
   -DABSEP (abandonment under another key) -DDISKGONE -DCOPIES=1 (one copy) -DNETLATE -DNOFENCECOPY (a holder that ignores rounds). */
#ifndef COPIES
#define COPIES 2
#endif
byte req=0; bool intent[3]; byte out[3]; bool ab2[3];
byte gen=0; byte lg[3]; byte rec[3];
byte dS[2], dG[2];          /* own 'done' journal record: serial, signature */
byte pS[2], pG[2];          /* copy of node i's record held by its peer   */
bool abJ[3];                /* resolver journal */
bool dead0=false, diskgone=false; bool lost=false;
bool pR[2]; byte pOs[2], pOg[2];  /* commits that may land late */
byte rel[3]; byte relK=0; bool abAnn[3]; byte sigs[3];
byte crashes=0;

/* step 2 of Issue: INSERT of the intent; step 5: of the outcome */
inline land_req(m){ if :: req==0 -> req=m; intent[m]=true :: else -> skip fi }
inline land_out(s_,g_){ if :: intent[s_] && out[s_]==0 -> out[s_]=g_ :: else -> skip fi }
/* released beats unreleased: a record that conflicts becomes the next version, -DOVERRIDE; without it nothing conflicts in this model */
#ifdef OVERRIDE
#define ABC(k) (out[k]!=3)
#else
#define ABC(k) (out[k]==0)
#endif
#ifdef NOGATE
#define GATE(k) (lg[k]==gen)
#else
#define GATE(k) (rec[0]==gen && rec[1]==gen && rec[2]==gen)
#endif
inline redo(s_,g_){
  if :: s_!=0 ->
#ifdef OVERRIDE
      req=s_;
#else
      if :: req==0 -> req=s_ :: else fi;
#endif
      intent[s_]=true;
      if :: out[s_]==0 -> out[s_]=g_ 
#ifdef OVERRIDE
         :: out[s_]!=0 && out[s_]!=g_ -> out[s_]=g_   /* released beats unreleased: append version */
#endif
         :: else fi
     :: else fi }

/* steps 1 to 3 of the round: take the release lock, put the own records and the held copies back, say so. COMPARE: ca/round.go, ca/recover.go */
proctype Recon(byte i){
endR: do
  :: atomic { rec[i]!=gen && !(i==0 && dead0) ->
      lg[i]=gen;
      if :: i<2 ->
#ifdef NOJSIG
           if :: dS[i]!=0 -> if :: req==0 -> req=dS[i] :: else fi; intent[dS[i]]=true :: else fi
#else
           redo(dS[i],dG[i]);
#if COPIES==2
           redo(pS[1-i],pG[1-i])
#endif
#endif
         :: else -> if :: abJ[1] -> intent[1]=true; if :: ABC(1) -> out[1]=3 :: else fi :: else fi;
                    if :: abJ[2] -> intent[2]=true; if :: ABC(2) -> out[2]=3 :: else fi :: else fi
      fi;
      rec[i]=gen }
  :: atomic { i==1 && dead0 && rec[1]==gen && rec[0]!=gen -> rec[0]=gen } /* peer copy holder (or timeout) speaks for the dead node */
  od }

/* runBatch under the gate of the round. COMPARE: ca/batch.go release, its lock and the second holder */
proctype Node(byte i){
  byte s=0,o=0,g=0; byte sg=i+1;
{
skip;
START: atomic { s=0; o=0 };
    atomic { (GATE(i) && lg[i]==gen); g=gen };
T1: if
    :: atomic { g==gen -> land_req(sg) } 
    :: atomic { g==gen -> land_req(sg) } ; goto T1       /* landed, answer lost */
    :: atomic { g==gen && !pR[i] -> pR[i]=true }; goto T1 /* may land late */
    :: g!=gen -> goto START
    :: atomic { crashes<1 -> crashes++ }; goto START
    fi;
T2: if :: atomic { g==gen && req!=0 -> s=req; o=out[s] }
    :: g==gen && req==0 -> goto T1
    :: g!=gen -> goto START fi;
    if :: o!=0 -> goto T4 :: else fi;
    /* sign */ sigs[s]=sigs[s]|sg;
    assert(s!=0);
T3: if
    :: atomic { g==gen -> land_out(s,sg) }
    :: atomic { g==gen -> land_out(s,sg) }; goto T3
    :: atomic { g==gen && pOs[i]==0 -> pOs[i]=s; pOg[i]=sg }; goto T3
    :: g!=gen -> goto START
    :: atomic { crashes<1 -> crashes++ }; goto START
    fi;
T4: /* read back by request key on another database node */
    if :: atomic { g==gen -> s=req; o=0; if :: s!=0 -> o=out[s] :: else fi }
    :: g!=gen -> goto START fi;
    if :: s==0 -> goto T1 :: o==0 && s!=0 -> goto T2 :: o==3 -> goto END :: else fi;
#ifdef MEMRELEASE
    o=sg;                      /* releases what it signed, not what the row says */
#endif
T5: /* journal 'done' (own + copy); generation must still be the one of the read-back */
    if
#ifdef NOLOCK
    :: atomic { true -> dS[i]=s; dG[i]=o; pS[i]=s; pG[i]=o };
#else
#if COPIES==2 && !defined(NOFENCECOPY)
    /* the holder of the copy refuses a record of an older generation than its own */
    :: atomic { g==lg[i] && (g==lg[1-i] || (dead0 && i==1)) -> dS[i]=s; dG[i]=o; pS[i]=s; pG[i]=o };
#else
    :: atomic { g==lg[i] -> dS[i]=s; dG[i]=o; pS[i]=s; pG[i]=o };
#endif
    :: g!=lg[i] -> goto START
#endif
    fi;
    /* release */
    atomic { 
       assert(o==1||o==2);
       assert(rel[s]==0 || rel[s]==o);       /* one certificate per serial */
       assert(relK==0 || relK==s);           /* one serial per request key */
       assert(!ab2[s]); assert(!abAnn[s]);
       rel[s]=o; relK=s };
    /* the client may ask again */
    if :: goto START :: goto END fi;
END: skip } unless { i==0 && dead0 } }

/* Engine.abandon */
proctype Resolver(){ byte s;
  if :: s=1 :: s=2 :: goto done fi;
  (intent[s]);
#ifdef ABSEP
  atomic { out[s]==0 && GATE(2) -> ab2[s]=true; }
#else
  atomic { GATE(2) && lg[2]==gen -> if :: intent[s]&&out[s]==0 -> out[s]=3; abJ[s]=true; abAnn[s]=true :: else fi }
#endif
done: skip }

/* commits that land late; step 4 of the round, closing the lanes, kills them (they are gone with the loss unless NETLATE) */
proctype Net(){
endN: do
  :: atomic { pR[0] -> land_req(1); pR[0]=false }
  :: atomic { pR[1] -> land_req(2); pR[1]=false }
  :: atomic { pOs[0]!=0 -> land_out(pOs[0],pOg[0]); pOs[0]=0 }
  :: atomic { pOs[1]!=0 -> land_out(pOs[1],pOg[1]); pOs[1]=0 }
  od }

proctype Fault(){
  /* database loses a suffix of its commits, once */
  if :: true -> goto F2 :: true fi;
  atomic { !lost -> lost=true; gen++;
    if :: out[1]=0; out[2]=0
       :: out[1]=0; out[2]=0; req=0; intent[1]=false; intent[2]=false fi;
#ifndef NETLATE
    pR[0]=false; pR[1]=false; pOs[0]=0; pOs[1]=0
#endif
  };
F2:
#ifdef DISKGONE
  if :: atomic { dead0=true; dS[0]=0; dG[0]=0; pS[1]=0; pG[1]=0 } :: skip fi
#else
  skip
#endif
}
#ifdef DISKFIRST
proctype Disk(){ if :: atomic { dead0=true; dS[0]=0; dG[0]=0; pS[1]=0; pG[1]=0 } :: skip fi }
#endif
init { atomic { run Recon(0); run Recon(1); run Recon(2); run Node(0); run Node(1); run Resolver(); run Net(); run Fault();
#ifdef DISKFIRST
 run Disk();
#endif
 } }
